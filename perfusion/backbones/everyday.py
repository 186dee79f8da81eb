"""The grammar of the built-in captions: symbols and the phrases that may stand for each."""


def _words(text: str) -> tuple[str, ...]:
    """Phrases of one word separated by spaces, underscores standing for spaces inside a phrase."""
    return tuple(word.replace("_", " ") for word in text.split())


# Each symbol with its phrases, all equally likely; a phrase that is listed twice is twice as likely.
PHRASES: dict[str, tuple[str, ...]] = {
    "caption": (
        *["{scene}"] * 7,
        *["{picture} of {scene}"] * 4,
        *["{picture} of {subject}"] * 2,
        *["{scene}, {manner}"] * 2,
        "{subject}",
        "{picture} of {place_name}",
        "{place_name} {when}",
        "{picture} of {place_name} {when}, {manner}",
    ),
    "scene": (
        "{animal_np} {animal_does} {where}",
        "{animal_np} {animal_does} {where}",
        "{animal_np} {animal_does}",
        "{animal_np} and {animal_np} {where}",
        "{animal_np} next to {thing_np}",
        "{animal_np} wearing {worn_np}",
        "{animal_np} in {vehicle_np}",
        "{number} {animals} {animal_does} {where}",
        "{person_np} {person_does} {where}",
        "{person_np} {person_does} {where}",
        "{person_np} {person_does} {when}",
        "{person_np} wearing {worn_np} {where}",
        "{person_np} in {worn_np} holding {thing_np}",
        "{person_np} with {animal_np} {where}",
        "{person_np} and {person_np} {person_does}",
        "{person_np} looking at {thing_np}",
        "{number} {persons} {person_does} {where}",
        "{thing_np} on {surface}",
        "{thing_np} on {surface} next to {thing_np}",
        "{thing_np} {where}",
        "{thing_np} and {thing_np} on {surface}",
        "{thing_np} made of {material}",
        "{thing_np} in the shape of {animal_np}",
        "{number} {things} on {surface}",
        "{food_np} on {surface}",
        "{food_np} with {food} and {food}",
        "a {dish} of {food} on {surface}",
        "a {dish} of {food} next to {thing_np}",
        "{vehicle_np} parked {where}",
        "{vehicle_np} {vehicle_does} {where} {when}",
        "{vehicle_np} next to {vehicle_np}",
        "{place_np} with {thing_np} and {thing_np}",
        "{place_np} full of {things}",
        "{place_np} {when}",
    ),
    "subject": (
        "{animal_np}",
        "{person_np}",
        "{thing_np}",
        "{food_np}",
        "{vehicle_np}",
        "{place_np}",
    ),
    "animal_np": (
        "{a} {animal}",
        "{a} {adjective} {animal}",
        "{a} {colour} {animal}",
        "{a} {adjective} {colour} {animal}",
    ),
    "person_np": ("{a} {person}", "{a} {person}", "{a} {person_adjective} {person}"),
    "thing_np": ("{a} {thing}", "{a} {adjective} {thing}", "{a} {colour} {thing}", "{a} {material} {thing}"),
    "food_np": ("some {food}", "a {dish} of {food}", "fresh {food}"),
    "vehicle_np": ("{a} {vehicle}", "{a} {adjective} {vehicle}", "{a} {colour} {vehicle}"),
    "place_np": ("{a} {place}", "{a} {adjective} {place}", "{a} {place_adjective} {place}"),
    "worn_np": ("a {worn}", "a {colour} {worn}", "a {adjective} {worn}", "a {colour} {worn} and a {colour} {worn}"),
    "where": (
        "in the {place}",
        "in a {place}",
        "in a {place_adjective} {place}",
        "near the {place}",
        "in front of a {place}",
        "in {place_name}",
        "on {surface}",
        "{outdoors}",
        "{outdoors} {when}",
    ),
    "a": _words("a a a a a a the the one this my his her their our"),
    "number": _words("two two three three four five some many several a_group_of a_pair_of a_row_of"),
    "picture": _words(
        "a_photo a_photo a_photo a_photo a_picture a_picture an_image a_photograph a_close-up a_close-up_photo "
        "a_portrait a_snapshot a_black_and_white_photo a_blurry_photo a_bright_photo a_dark_photo "
        "a_low_resolution_photo a_good_photo a_cropped_photo an_aerial_view a_side_view a_rendering a_3d_render "
        "a_drawing a_sketch a_pencil_drawing a_charcoal_drawing a_painting an_oil_painting a_watercolor_painting "
        "a_watercolor an_illustration a_cartoon a_comic a_mosaic a_collage a_poster a_sculpture a_statue a_tattoo "
        "an_origami_figure an_embroidery a_graffiti a_stained_glass_window an_icon a_sticker a_woodcut a_plush_toy "
        "a_toy pixel_art concept_art a_screenshot a_postcard a_vintage_photo a_polaroid"
    ),
    "manner": (
        "highly detailed",
        "seen from above",
        "seen from behind",
        "in soft light",
        "in black and white",
        "with a blurred background",
        "in the style of an old master",
        "in the style of a comic book",
        "with bright colors",
        "with a plain white background",
        "full of small details",
        "in warm colors",
        "against a blue sky",
        "shot on film",
        "with long shadows",
        "digital art",
        "minimalist",
        "studio lighting",
        "out of focus",
        "wide angle",
    ),
    "when": (
        "at night",
        "at sunset",
        "at dawn",
        "at noon",
        "in the morning",
        "in the evening",
        "in the rain",
        "in the fog",
        "in winter",
        "in summer",
        "in autumn",
        "in spring",
        "on a sunny day",
        "on a cloudy day",
        "on a windy day",
        "during a storm",
        "under a full moon",
        "on a weekend",
    ),
    "outdoors": (
        "on the beach",
        "in the snow",
        "in the grass",
        "in the water",
        "under water",
        "in the woods",
        "by the river",
        "by the sea",
        "on a hill",
        "on top of a mountain",
        "on the street",
        "on the sidewalk",
        "at the side of the road",
        "under a tree",
        "between rocks",
        "in the mud",
        "in the sky",
        "outside",
        "indoors",
        "at home",
        "at work",
        "by the window",
        "in a corner",
        "behind a fence",
        "in front of a mirror",
        "on the moon",
        "in outer space",
    ),
    "surface": (
        "a table",
        "a wooden table",
        "the floor",
        "a shelf",
        "a desk",
        "a bed",
        "a couch",
        "a chair",
        "a bench",
        "a counter",
        "a carpet",
        "a blanket",
        "a plate",
        "a tray",
        "a stone wall",
        "a window sill",
        "a roof",
        "a pile of books",
        "a pile of leaves",
        "a cardboard box",
        "a wooden floor",
        "a white background",
    ),
    "animal": _words(
        "cat cat dog dog kitten puppy horse pony cow calf sheep lamb goat pig donkey rabbit hamster mouse rat "
        "squirrel hedgehog fox wolf bear polar_bear panda koala kangaroo elephant giraffe zebra lion tiger leopard "
        "cheetah monkey gorilla hippo rhino camel deer moose beaver otter seal dolphin whale shark fish goldfish "
        "octopus crab lobster jellyfish turtle tortoise frog lizard snake crocodile dinosaur dragon bird pigeon "
        "crow owl eagle parrot penguin duck goose swan chicken rooster flamingo ostrich sparrow bee butterfly "
        "spider ant snail bat raccoon skunk llama"
    ),
    "animals": _words(
        "cats dogs kittens puppies horses cows sheep goats pigs rabbits foxes wolves bears elephants giraffes "
        "zebras lions monkeys camels deer dolphins fish turtles frogs birds pigeons owls parrots penguins ducks "
        "geese swans chickens flamingos bees butterflies snails llamas"
    ),
    "animal_does": _words(
        "sleeping sitting standing lying_down running walking jumping playing eating drinking swimming hiding "
        "resting waiting looking_up looking_at_the_camera yawning stretching climbing digging sniffing_a_flower "
        "chasing_a_ball carrying_a_stick catching_a_frisbee rolling_around grazing staring_out_of_a_window "
        "shaking_off_water riding_a_skateboard being_brushed being_fed curled_up"
    ),
    "person": _words(
        "man man woman woman boy girl child baby toddler teenager student teacher doctor nurse farmer fisherman "
        "cook chef baker waiter carpenter plumber painter sculptor photographer writer musician guitarist drummer "
        "pianist singer dancer actor clown magician athlete runner swimmer surfer skier skateboarder cyclist "
        "climber hiker soldier sailor pilot astronaut firefighter police_officer mechanic engineer scientist "
        "gardener mail_carrier tourist couple bride groom family grandmother grandfather mother father sister "
        "brother friend neighbor king queen knight wizard pirate robot superhero"
    ),
    "persons": _words(
        "men women boys girls children babies students teachers doctors farmers cooks musicians dancers athletes "
        "runners surfers skiers cyclists hikers soldiers sailors astronauts firefighters tourists friends people "
        "people people robots"
    ),
    "person_adjective": _words(
        "young old tall happy sad smiling laughing tired serious angry surprised elderly bearded blond "
        "curly-haired barefoot lonely proud busy famous"
    ),
    "person_does": _words(
        "reading_a_book talking_on_the_phone riding_a_bike riding_a_horse playing_guitar playing_chess "
        "playing_football playing_tennis playing_cards playing_video_games cooking_dinner baking_bread "
        "cutting_vegetables eating_lunch drinking_coffee drinking_tea washing_dishes cleaning_the_house "
        "painting_a_wall fixing_a_car watering_plants planting_a_tree taking_a_photo walking_the_dog feeding_birds "
        "flying_a_kite throwing_a_ball swimming surfing skiing skateboarding climbing dancing singing sleeping "
        "sitting_down waiting_for_a_bus carrying_a_bag pushing_a_stroller opening_a_door writing_a_letter "
        "working_on_a_laptop watching_television shopping hugging waving jumping running jogging stretching "
        "fishing rowing building_a_sandcastle making_a_snowman blowing_out_candles telling_a_story brushing_teeth "
        "tying_shoes"
    ),
    "thing": _words(
        "book lamp chair table couch bed pillow blanket clock watch mirror vase bottle cup mug glass bowl plate "
        "spoon fork knife pan pot kettle teapot toaster oven fridge sink bathtub towel soap brush comb toothbrush "
        "umbrella backpack suitcase handbag wallet key phone laptop computer keyboard television radio camera "
        "speaker headphones guitar piano violin drum trumpet flute ball football basketball tennis_racket "
        "baseball_bat skateboard surfboard snowboard sled kite frisbee teddy_bear doll puzzle toy_car toy_robot "
        "balloon candle picture_frame painting statue flag sign poster map letter envelope box basket bucket "
        "ladder hammer saw screwdriver drill shovel rake flower rose tulip sunflower cactus tree leaf mushroom "
        "pumpkin shell stone feather telescope microscope globe lantern fan heater tent campfire bench fence gate "
        "window door bell trophy coin ring necklace crown mask birdhouse scarecrow snowman rug curtain cupboard "
        "drawer notebook pencil pen scissors"
    ),
    "things": _words(
        "books lamps chairs pillows clocks mirrors vases bottles cups mugs glasses bowls plates spoons candles "
        "keys phones computers cameras guitars balls kites dolls toys balloons paintings statues flags signs boxes "
        "baskets flowers roses tulips sunflowers trees leaves mushrooms pumpkins shells stones umbrellas suitcases "
        "tents benches windows bells coins masks pencils shoes hats"
    ),
    "food": _words(
        "bread rice pasta noodles soup salad cheese eggs bacon ham chicken fish shrimp sushi pizza sandwiches "
        "burgers fries potatoes tomatoes carrots onions peppers mushrooms broccoli corn beans peas lettuce "
        "cucumbers apples oranges bananas grapes strawberries cherries peaches pears lemons pineapple watermelon "
        "mango berries nuts cake cookies donuts pancakes waffles pie ice_cream chocolate candy honey jam butter "
        "yogurt coffee tea milk juice"
    ),
    "dish": _words("plate bowl basket box tray bag pile table cup jar pan slice"),
    "vehicle": _words(
        "car car sports_car taxi truck pickup_truck fire_truck police_car ambulance bus school_bus van motorcycle "
        "scooter bicycle tricycle train steam_train tram subway_train airplane helicopter hot_air_balloon rocket "
        "spaceship boat sailboat ship ferry canoe kayak submarine tractor bulldozer crane wagon carriage sled "
        "golf_cart race_car"
    ),
    "vehicle_does": _words("driving_fast moving_slowly waiting turning leaving arriving breaking_down stuck"),
    "place": _words(
        "house garden park forest field meadow desert jungle valley canyon cave island lake pond river waterfall "
        "harbor beach village town city street square market shop bakery bookstore supermarket restaurant cafe bar "
        "kitchen bathroom bedroom living_room hallway basement attic garage office classroom library museum "
        "gallery theater cinema hospital church temple castle palace tower lighthouse bridge tunnel station "
        "airport stadium gym playground swimming_pool zoo farm barn stable vineyard orchard greenhouse factory "
        "workshop construction_site parking_lot gas_station hotel cabin campsite courtyard balcony staircase "
        "train_station amusement_park"
    ),
    "place_adjective": _words(
        "crowded empty quiet busy sunny snowy foggy dark bright abandoned ancient modern cozy narrow flooded messy "
        "tidy wooden rainy green peaceful"
    ),
    "place_name": _words(
        "Paris London New_York Tokyo Rome Venice Berlin Istanbul Cairo Moscow Sydney Rio India China Africa Mexico "
        "Greece Norway Iceland Scotland Hawaii Alaska California Antarctica the_Alps the_Himalayas the_Sahara "
        "the_Arctic"
    ),
    "material": _words(
        "wood glass metal plastic paper stone leather wool silver gold bronze marble clay cardboard crystal ice "
        "chocolate straw"
    ),
    "worn": _words(
        "hat cap helmet crown scarf tie bow_tie coat jacket raincoat sweater shirt t-shirt dress skirt suit "
        "costume robe cape apron vest swimsuit mask backpack necklace ribbon bandana wig beanie kimono"
    ),
    "colour": _words(
        "red orange yellow green blue purple pink brown black white gray golden silver turquoise beige dark_blue "
        "light_green bright_red black_and_white"
    ),
    "adjective": _words(
        "small small big big large tiny huge little tall short long round square old old new young beautiful cute "
        "funny strange ugly pretty fluffy furry hairy smooth shiny dirty clean wet dry broken rusty wooden striped "
        "spotted colorful bright dark pale transparent soft hard heavy thin fat fancy simple plain expensive cheap "
        "modern vintage antique traditional handmade homemade lonely lost sleepy happy angry frozen burning "
        "glowing floating flying giant miniature cool nice weird elegant majestic scary friendly"
    ),
}
